"""The home domain: China's tourist attractions."""

from mtgdm.tourism.domain import Tourism

__all__ = ["Tourism"]
