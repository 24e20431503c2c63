"""`python -m flows` is `speck`."""

from flows.cli import main

if __name__ == "__main__":
    main()
