"""A campaign of trainings that asks whether pre-training pays: its plan, its runs, its results (bench/pays.py)."""
