"""The runs API from the terminal (`runs`) and for agents (`runs mcp`)."""

__version__ = "0.2.0"
