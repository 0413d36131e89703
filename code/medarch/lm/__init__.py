"""Small language models assembled from the topics: data in, text out, and a bridge to transformers.

The package imports nothing by itself. Each name is imported from the module that defines it, such as
``from medarch.lm.loading import load``, so that what a page or a record stands on can be read from its imports,
and no more than that.
"""
