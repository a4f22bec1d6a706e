"""The application: data, training, stages, flow, tracking and the ``flowra`` command.

It imports the four library packages; they never import it, nor each other.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("flowra-pipelines")
