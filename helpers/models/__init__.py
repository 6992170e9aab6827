"""Networks and the folders (bundles) that they become: conversion, quantisation, comparison, and running them."""
