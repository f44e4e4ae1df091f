"""Take a sparse model to where it runs: faster on this machine, smaller on disk, and in other runtimes' formats."""

from __future__ import annotations

from rarefy.deploy.accelerated import AcceleratedModel, accelerate
from rarefy.deploy.files import load, save
from rarefy.deploy.onnx import export_onnx
from rarefy.deploy.plan import LayerPlan, Plan

__all__ = ["AcceleratedModel", "LayerPlan", "Plan", "accelerate", "export_onnx", "load", "save"]
