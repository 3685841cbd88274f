-- MathML as pandoc writes it, without the TeX that it keeps beside each equation: the search index would hold both.
function Math(equation)
  local text = pandoc.write(pandoc.Pandoc({ pandoc.Plain({ equation }) }), "html", { html_math_method = "mathml" })
  if not text:find("<math", 1, true) then
    io.stderr:write("[WARNING] Could not convert TeX math " .. equation.text .. "\n")
    return nil
  end
  return pandoc.RawInline("html", (text:gsub("<annotation.-</annotation>", "")))
end
