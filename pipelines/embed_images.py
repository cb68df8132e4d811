"""What a submitted job runs for `nev embed-images`.

ray job submit --working-dir . -- python pipelines/embed_images.py --config CONFIG
ray job submit --working-dir . -- python pipelines/embed_images.py --model MODEL --input INPUT --output s3://BUCKET/VECTORS
"""

from nev.commands.main import make_pipeline

app = make_pipeline("embed-images")

if __name__ == "__main__":
    app()
