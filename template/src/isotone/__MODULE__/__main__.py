"""`python -m isotone.__MODULE__`: the same as `isotone __NAME__`."""

from isotone.__MODULE__.cli import main

if __name__ == "__main__":
    main()
