"""`python -m isotone.quamba2`: the same as `isotone quamba2`."""

from isotone.quamba2.cli import main

if __name__ == "__main__":
    main()
