"""`python -m nev` is `nev`."""

from nev.commands.main import app

app(prog_name="nev")
