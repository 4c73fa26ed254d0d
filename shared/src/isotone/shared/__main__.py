"""`python -m isotone.shared`: the `isotone` command."""

from isotone.shared.cli import main

if __name__ == "__main__":
    main()
