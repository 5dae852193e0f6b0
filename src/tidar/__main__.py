"""`python -m tidar` is the `tidar` command."""

from tidar.cli import main

if __name__ == "__main__":
    main()
