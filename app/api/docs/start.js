// A file of its own: the page's Content-Security-Policy allows no script within the page.
"use strict";

SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "openapi.json",
  layout: "BaseLayout",
  validatorUrl: null, // the default sends the document's address to another host
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
});
