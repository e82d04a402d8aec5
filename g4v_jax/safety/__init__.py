"""Safety at use: the hazard gate and its threshold."""
