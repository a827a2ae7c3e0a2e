"""`python -m pycse`, and what launchers of several processes take: torchrun -m pycse."""

from pycse.cli import main

if __name__ == "__main__":
    main()
