"""Published weights in and out: one file a family of models, each with its name table and its config both ways."""
