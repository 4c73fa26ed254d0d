"""`python -m isotone.distzo2`: the same as `isotone distzo2`."""

from isotone.distzo2.cli import main

if __name__ == "__main__":
    main()
