"""What a submitted job runs for `nev embed-text`.

ray job submit --working-dir . -- python pipelines/embed_text.py --config CONFIG
"""

from nev.commands.main import make_pipeline

app = make_pipeline("embed-text")

if __name__ == "__main__":
    app()
