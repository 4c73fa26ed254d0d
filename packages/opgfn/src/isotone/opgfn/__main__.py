"""`python -m isotone.opgfn`: the same as `isotone opgfn`."""

from isotone.opgfn.cli import main

if __name__ == "__main__":
    main()
