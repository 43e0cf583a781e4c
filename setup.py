"""Packaging: the stages lie beside jigsaw_pretrain/ in the checkout, and inside it when installed."""

from setuptools import find_packages, setup

STAGES = ("formats", "prep", "train", "detect")

setup(
    packages=[
        *find_packages(".", include=["jigsaw_pretrain", "jigsaw_pretrain.*"]),
        *(f"jigsaw_pretrain.{name}" for stage in STAGES for name in find_packages(".", include=[stage, f"{stage}.*"])),
        "jigsaw_pretrain.recipes",
    ],
    package_dir={f"jigsaw_pretrain.{folder}": folder for folder in (*STAGES, "recipes")},
)
