from columns_of_texts import model, static, tiny_model, wide_model  # noqa: F401
