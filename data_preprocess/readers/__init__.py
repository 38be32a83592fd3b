"""Readers of published question sets, one small module a format; `registry` lists them and tells them apart."""
