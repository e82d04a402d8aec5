"""Where a clip came from: the invisible mark that written videos carry, and the edits it is measured against."""
