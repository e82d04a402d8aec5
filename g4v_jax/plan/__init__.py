"""What a step costs on machines that are not here: its arithmetic, its memory, its traffic, and the bounds on its time."""
