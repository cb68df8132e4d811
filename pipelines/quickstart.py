"""What a submitted job runs for `nev quickstart`.

ray job submit --working-dir . -- python pipelines/quickstart.py
"""

from nev.commands.main import make_pipeline

app = make_pipeline("quickstart")

if __name__ == "__main__":
    app()
