"""What a submitted job runs for `nev filter`.

ray job submit --working-dir . -- python pipelines/filter.py --vectors VECTORS --min-cosine 0.3 --output KEEP.parquet
"""

from nev.commands.main import make_pipeline

app = make_pipeline("filter")

if __name__ == "__main__":
    app()
