"""`python -m preftune`, and the `preftune` command."""

from __future__ import annotations


def main() -> None:
    from preftune.cli.app import run

    run()


if __name__ == "__main__":
    main()
