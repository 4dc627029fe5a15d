"""The command `python -m toy.study`; see study.py."""

from toy.study.study import main

if __name__ == "__main__":
    main()
