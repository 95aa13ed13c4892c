"""`python -m calipers`, and `torchrun -m calipers`: the command."""

from calipers.cli import app

if __name__ == "__main__":
    app(prog_name="calipers")
