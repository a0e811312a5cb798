"""The lab: models, data, training loop, recipes and reports around torchgrow.

Uses torchgrow's public names only, and needs the ``lab`` extra: ``pip install 'torchgrow[lab]'``.
"""
