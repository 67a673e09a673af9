// hey-api. Node needs file names with their extension in imports.
export default { input: "openapi.json", output: { path: "hey", module: { extension: ".js" } }, logs: { level: "silent" } };
