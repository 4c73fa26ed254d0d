"""`python -m isotone.normuon`: the same as `isotone normuon`."""

from isotone.normuon.cli import main

if __name__ == "__main__":
    main()
