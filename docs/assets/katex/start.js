// Formulas: arithmatex leaves \( … \) and \[ … \] in elements of this class.
document$.subscribe(({ body }) => {
  body.querySelectorAll(".arithmatex").forEach((element) => {
    const display = element.textContent.trim().startsWith("\\[");
    const text = element.textContent.trim().replace(/^\\[([]/, "").replace(/\\[)\]]$/, "");
    katex.render(text, element, { displayMode: display, throwOnError: false });
  });
});
