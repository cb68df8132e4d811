"""What a submitted job runs for `nev index`.

ray job submit --working-dir . -- python pipelines/index.py --model MODEL --images VECTORS --index s3://BUCKET/INDEX
"""

from nev.commands.main import make_pipeline

app = make_pipeline("index")

if __name__ == "__main__":
    app()
