"""Google Colab: what a notebook's first cell runs after it has cloned and installed the project."""

import sys
from pathlib import Path

from google.colab import drive

sys.path.append("/content/companion")  # installed after Python started, which does not see it
# Runs go to your Drive: after a disconnect run all cells again, and they go on.
drive.mount("/content/drive")
runs, link = Path("/content/drive/MyDrive/ddpo-runs"), Path("/content/companion/data/runs")
runs.mkdir(exist_ok=True)
if not link.exists():
    link.symlink_to(runs)
