"""``python -m brainfound`` and ``accelerate launch -m brainfound``."""

from brainfound.cli.main import main

if __name__ == "__main__":
    main()
