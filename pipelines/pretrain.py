"""What a submitted job runs for `nev pretrain`.

ray job submit --working-dir . -- python pipelines/pretrain.py --config CONFIG --objective mim
"""

from nev.commands.main import make_pipeline

app = make_pipeline("pretrain")

if __name__ == "__main__":
    app()
