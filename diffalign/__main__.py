"""`python -m diffalign`, for launchers that start modules."""

from diffalign.cli import main

if __name__ == "__main__":
    main()
