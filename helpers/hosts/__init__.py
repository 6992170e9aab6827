"""Set-up of the places the project runs in: Java, notebooks on Colab and Databricks, packed environments."""
