"""`python -m sagittal` is the command line."""

from sagittal.cli import main

if __name__ == "__main__":
    main()
