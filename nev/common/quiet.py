"""Keeps libraries off the console, in this process and in the processes that it starts."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Ray Train must not change the working folder, and progress bars of libraries would break nev's live line. After the loss of a
# node Ray Train still counts the node for up to 20 s and waits for workers there: 15 s instead of the default of 60 s. A process
# of Tune that runs several trials may need some seconds for the end of the previous trial.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "TQDM_DISABLE": "1",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def quiet() -> None:
    """Let libraries log errors only. Of MLflow critical errors only, since nev reports MLflow's exceptions itself."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.widgets", "alembic", "httpx", "transformers", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(ray|mlflow|timm|transformers)")
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without ipywidgets


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and reports off the console while a model is loaded or saved; nev checks what is missing itself."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
