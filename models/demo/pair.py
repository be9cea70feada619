"""Where the embedded demo pair stands."""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
"""A Llama-format model of 11M parameters that writes Python."""
DRAFT = Path(__file__).parent / "draft"
"""A draft model of 2M parameters, distilled from the target."""
