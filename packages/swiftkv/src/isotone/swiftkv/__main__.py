"""`python -m isotone.swiftkv`: the same as `isotone swiftkv`."""

from isotone.swiftkv.cli import main

if __name__ == "__main__":
    main()
