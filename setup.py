"""What `pip install` brings: `helpers`, the profiles and cards of conf/, and the first part of requirements.txt.

The extra `train` brings the second part too.
"""

from pathlib import Path

from setuptools import find_packages, setup

SECOND = "# Train, "  # begins the second part


def pins(part: str) -> list[str]:
    """The lines of a part without their comments."""
    lines = (line.partition("#")[0].strip() for line in part.splitlines())
    return [line for line in lines if line]


run, train = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").split(SECOND, 1)
setup(
    install_requires=pins(run),
    extras_require={"train": pins(SECOND + train)},
    packages=[*find_packages(include=["helpers*"]), "helpers.conf"],
    package_dir={"helpers.conf": "conf"},
    package_data={"helpers.conf": ["*.yaml", "*.properties", "cards/*"], "helpers.tracking": ["page.*"]},
)
