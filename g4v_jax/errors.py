"""The one exception that speaks to the user, and the helper that suggests names.

Everything a user can cause (a bad file, a misspelt field, a mesh that does not fit) is raised as
`UserError`; the command line prints its message as one line and exits with status 2, without a traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the message names the thing and says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `known`, or the list of known names where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"
