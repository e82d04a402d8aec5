"""`python -m g4v_jax COMMAND` is the same as `g4v COMMAND`."""

from g4v_jax.cli import main

if __name__ == "__main__":
    main()
