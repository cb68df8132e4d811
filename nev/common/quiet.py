"""Keeping libraries off the console, in this process and in those that it starts."""

from __future__ import annotations

import logging
import os
import warnings

# Ray Train must not change the working folder, and tqdm bars of libraries must not fight with the one live line. After a node is
# lost, its elastic policy counts that node for up to 20 s more, and waits for workers there: not the 60 s of its default. A
# process of Tune that takes one trial after another may be some seconds with the end of the last one.
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
    """Keep the libraries off this process's console: what they have to say at error level still comes through.

    MLflow's errors are exceptions as well, which are caught and told where they matter.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "alembic", "httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(ray|mlflow|timm|transformers)")
