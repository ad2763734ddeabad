"Build bnml from settings.ini: one place for the name, the version and what it needs."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
ini = cfg["DEFAULT"]

setup(
    name=ini["lib_name"],
    version=ini["version"],
    description=ini["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=ini["author"],
    author_email=ini["author_email"],
    url=ini["git_url"],
    license="Apache-2.0",
    keywords=ini["keywords"],
    python_requires=f">={ini['min_python']}",
    packages=find_packages(include=["bnml", "bnml.*", "bnml_migrations", "bnml_migrations.*"]),
    package_data={"bnml_migrations": ["*.mako"]},
    install_requires=ini["requirements"].split(),
    extras_require={"dev": ini["dev_requirements"].split(), "bench": ini["bench_requirements"].split(),
                    "cluster": ini["cluster_requirements"].split()},
    entry_points={"console_scripts": ini["console_scripts"].split(), "nbdev": [f"{ini['lib_name']}={ini['lib_name']}._modidx:d"]},
    zip_safe=False,
)
