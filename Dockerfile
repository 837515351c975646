# The command line with transformers and the CPU build of torch: docker build -t sparkling .
FROM python:3.12-slim
WORKDIR /opt/sparkling
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY sparkling_cli sparkling_cli
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[hf,plot]'
WORKDIR /data
ENTRYPOINT ["sparkling"]
