"""The command line, one file per subcommand; no algorithm lives here."""


def main() -> None:
    raise SystemExit("under construction")
