"""What a submitted job runs for `nev embed-images`.

ray job submit --working-dir . -- python pipelines/embed_images.py --config CONFIG
"""

from nev.commands.main import make_pipeline

app = make_pipeline("embed-images")

if __name__ == "__main__":
    app()
