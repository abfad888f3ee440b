#!/usr/bin/env python3
"""A model that draws on the first scales only: python3 small_model.py MODEL_DIR FOLDER SCALES"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cli"))
from program import model_of_scales  # noqa: E402

if not Path(sys.argv[2]).exists():
    model_of_scales(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), int(sys.argv[3]))
