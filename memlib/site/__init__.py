"""The book: chapters through papermill to jupyter-book, the ledger, notebooks for Colab."""
